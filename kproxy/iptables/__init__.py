"""The iptables backend: turns plans into chains and rules, and applies them with iptables-restore."""
