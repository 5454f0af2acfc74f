"""MuxServe's published evaluation (Duan et al., ICML 2024) replayed on the simulator.

`measured` compares the simulator with the authors' own runs on 32 A100 GPUs; `scale` compares systems and plans at the
size of the paper. The data is MuxServe's and is not part of this repository: every command takes its folder.
"""
