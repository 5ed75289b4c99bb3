"""A causal classifier as an ONNX model: its operators, its folder, its verification."""
