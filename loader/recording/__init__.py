"""Measuring samplings in the background, and what is known of it.

May import host, files, store, engine, calibration and quant.
"""
