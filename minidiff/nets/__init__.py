"""The networks: U-Net, VAE and CLIP, with diffusers' and transformers' parameter names."""
