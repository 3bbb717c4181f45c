"""Fused twins of the plain operations in `lorafit.layers`: the same numbers, fewer passes, fewer saved tensors.

Nothing here knows a method or a module. Each function has its plain twin named in its docstring, and a test that the
two agree.
"""
