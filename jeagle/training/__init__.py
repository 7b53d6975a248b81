"""Training EAGLE heads by online distillation: the frozen target runs inside the step and nothing of it is stored.

    synthesis.py   the target writes its own training text
    writer.py      one document of it
    prompts.py     what it is given to answer or continue, and the chat template around that
    overlap.py     whether texts hold evaluation prompts
    shards.py      a directory of JSON lines in shards, resumable
    documents.py   texts the target wrote, as token ids with a response mask
    packing.py     documents into rows of one length, and the deterministic loader over them
    vocabulary.py  the draft vocabulary, chosen by frequency
    initial.py     where a head starts: the target's own weights
    unroll.py      teacher (the target's states) and student (the head, unrolled as in decoding)
    losses.py      what the student's distribution is held against
    step.py        one jitted training step; Adam, accumulation, data parallelism
    recipe.py      everything a run depends on, as one small TOML file
    trainer.py     the loop: checkpoints, metrics, resumption
    run.py         from a recipe to a trainer that is ready to run

Extra shape letters: R rows of a micro-batch, A micro-batches of an update, U updates of a step, K unrolled depth.
"""
