"""The nftables backend: one table per IP family. Most Services share chains and add only elements to sets and maps."""
