"""Other engines, each in a process of its own. Nothing here needs jeagle: their Python may be another one."""
