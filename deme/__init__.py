"""Decouple-then-Merge for diffusion models (CVPR 2025, arXiv 2410.06664): what the scripts share.

The words that the code uses:

range        half-open interval [low, high) of timesteps that one copy of the network is finetuned on
expert       that finetuned copy; its weights are the EMA of those that were trained
teacher      the frozen pretrained network that an expert is held to (consistency loss)
control      `continued`: plain training on all timesteps for as many steps as all ranges together
distilled    the merged network, trained to match each range's expert in its range; ours, not the paper's
projection   bias-free 1×1 convolution behind every block of the UNet, at first the identity
task vector  finetuned − pretrained weights; coefficient: what it is multiplied with in the merge
neon         the pretrained network minus the task vector of training on its own samples (arXiv 2510.03597)
ensemble     sampling with the expert of each timestep's range, before merging
stream       what keeps the random draws of different runs of one experiment apart
record       what an output was made from, kept with it: decides whether it still fits
identity     the record of a folder of samples
"""
