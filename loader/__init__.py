"""The ComfyUI side: nodes, operations, loading, recording and routes."""
