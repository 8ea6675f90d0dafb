"""parallax: 3D-parallel training for PyTorch, where the mesh is invisible in the numbers."""
