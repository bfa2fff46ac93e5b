#!/usr/bin/env python
"""Another name of `gpu.py`, with the same flags: does rqa run on this machine's GPU, and how fast?

The code is not here, because torch imports a package called `cuda`, and scripts of this folder make it find this file.
"""

if __name__ == "cuda":
    raise ModuleNotFoundError("the package `cuda` is not installed", name="cuda")
if __name__ == "__main__":
    from gpu import main

    main()
