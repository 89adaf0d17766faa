"""Model files: safetensors headers, what a checkpoint holds, fingerprints, names and versions.

May import host, calibration and quant.
"""
