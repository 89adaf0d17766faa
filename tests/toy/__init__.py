"""A small SDXL for the tests and the demo.

Everything that a user runs (the stock nodes, the example workflows, our own nodes) runs on it
unchanged: only the checkpoint is a toy one. `checkpoint` writes that file and needs torch alone;
`nodes` is the node pack that lets ComfyUI recognise it.
"""
