"""The iptables backend: plans become chains, chains become iptables-restore input."""
