"""Jobs that a user asks for: choosing statistics for a model, searching it, exporting it.

May import host, files, store, engine, calibration and quant.
"""
