"""Diffusion pipelines: DreamBooth with any method, diffusers' files both ways, drawing. Needs the extra `diffusion`."""
