"""attnrec's Triton kernels, installed as `attnrec.kernels`.

There are none yet: on a GPU the reference serves (`python -m attnrec.info` says so). A kernel's file carries
the name of its op, imports nothing of the rest of the project and needs triton >= 3.6.
"""
