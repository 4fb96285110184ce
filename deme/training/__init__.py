"""The training loop that pretrain.py and finetune.py share, and what stands around it."""
