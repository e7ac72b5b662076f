"""What holds for the emulator's own tests."""

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton 3.9 does by default, without its warning
