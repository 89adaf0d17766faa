"""Quantized models in memory: how weights are held, loaded, patched, multiplied and saved.

May import host, files, calibration and quant.
"""
