"""Jobs that a user asks for: choosing how a model is quantized, searching and exporting it,
measuring effects of its layers, and comparing its pictures with the original's.

May import host, files, store, engine, calibration and quant.
"""
