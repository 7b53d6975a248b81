"""How a worker talks: one JSON object a line, a request on standard input, its answer on standard output.

    {"do": "load", "model": DIR, "gguf": FILE or null, "dtype": "float32", "threads": 2, "positions": 512, "batch": 8,
     "head": DIR or null, "drafts": 4}
        -> {"versions": {...}}, or {"missing": "what is not installed"}
    {"do": "generate", "prompts": [[ids], ...], "max_tokens": 64, "lookup": 0}
        -> {"ids": [[...], ...], "seconds": 1.5, "rounds": null}: greedy, EOS ignored, the time of the whole call

Anything else that goes wrong is {"error": "one sentence"}; the worker lives on and ends with its standard input.
head: an EAGLE head's Hugging Face directory, to draft so many tokens with. lookup: drafts of so many tokens taken from
the prompt (prompt lookup), 0 none. rounds: with a head, forwards of the target after the prompt's, summed over rows.
"""

import json
import os
import sys
import time


def serve(load):
    """load(request) returns (generate, versions); generate(prompts, max_tokens, lookup) the new ids of every prompt,
    and the rounds."""
    # What libraries print goes where errors go: standard output belongs to the protocol.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    generate = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if request["do"] == "load":
                generate, versions = load(request)
                answer = {"versions": versions}
            elif generate is None:
                answer = {"error": "nothing is loaded"}
            else:
                began = time.perf_counter()
                ids, rounds = generate(request["prompts"], request["max_tokens"], request["lookup"])
                answer = {"ids": ids, "seconds": time.perf_counter() - began, "rounds": rounds}
        except ImportError as error:
            answer = {"missing": error.name or str(error)}
        except Exception as error:  # whatever it is, the other peers still run
            said = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {said[0]}"[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
