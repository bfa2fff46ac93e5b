#!/usr/bin/env python
"""Does rqa run on this machine's GPU, and how fast? The command is `gpu.py`, with its flags.

It does not lie here: torch imports a package of this name, and finds this file where scripts of this folder run.
"""

if __name__ == "cuda":
    raise ModuleNotFoundError("the package `cuda` is not installed", name="cuda")
if __name__ == "__main__":
    from gpu import main

    main()
