"""The nftables backend: one table per family, whose maps all Services share."""
