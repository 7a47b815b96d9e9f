"""Proof that record and replay hold: every MoE architecture of transformers as a tiny model."""
