"""Quantized models in memory: how their weights are loaded, held, patched, multiplied and saved.

May import host, files, calibration and quant.
"""
