"""The Space's own modules.

ZeroGPU's package wants to be imported before torch, so this comes first.
"""

from msae_space.zerogpu import find_zerogpu

find_zerogpu()
