"""Image conditioning of FLUX.1: what turns references and control images into inputs of the transformer."""
