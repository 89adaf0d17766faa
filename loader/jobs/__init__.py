"""What a user asks for as a whole: choosing statistics, searching, exporting.

May import host, files, store, engine, calibration and quant.
"""
