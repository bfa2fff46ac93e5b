"""What executables import first: Ctrl-C during the slow imports that follow ends them without a word."""

import signal
import sys

if "torch" not in sys.modules and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `rqa.runtime.cli.run`
