"""TensorRT and TensorRT-RTX: the engine, its device memory, its CUDA graphs and its builder."""
