"""Recording statistics of every sampling in the background, and the state of the recording.

May import host, files, store, engine, calibration and quant.
"""
