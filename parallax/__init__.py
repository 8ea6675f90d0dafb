"""parallax: 3D-parallel training for PyTorch, where the mesh is invisible in the numbers.

Shape suffixes of names: B microbatch (samples), T tokens of a sequence, N = B*T tokens, D model, H heads, G key/value
heads, K head dim, F hidden of the MLP, V vocabulary, E experts. Upper case is the global size, lower case this rank's
shard: h_Nf holds f = F/tensor features of all N tokens, x_nD all features of n = N/tensor tokens.
"""
