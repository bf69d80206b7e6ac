"""The nftables backend: one table per IP family, with sets, maps and chains that all Services share."""
