"""The nftables backend's table, so far only as something that another proxy may have left behind."""
