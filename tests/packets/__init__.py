"""A table of packets for every recorded cluster: who sends them, to which address, and their fate in each mode.

`packets.txt` has one row per packet. Two or more spaces separate its columns:

    scenario      a directory in tests/golden
    sender        see senders.py; `endpoint A` is the pod with address A;
                  `node as A` is the node, where A is one of its additional addresses;
                  `... remembering S`: session affinity has sent this sender to endpoint S before
    destination   address:port and protocol
    fate          `untouched`: no rule changes source or destination
                  `dnat E, E`: DNAT to one of these endpoints, each with the same probability
                  `dnat+masq E`: in addition, the packet is masqueraded
                  `...+affinity`: in addition, session affinity sends the next packet to the same endpoint
                  `reject port-unreachable`, `drop`
                  A semicolon separates several fates, if the fate depends on the endpoint that is picked.

The fates are those in iptables mode. `nftables.txt` lists the rows whose fate differs in nftables mode, with that fate,
grouped by the reason: a heading `## REASON`, one of those in differences.py. All other rows have the same fate in both
modes. A row that differs but is not listed is an error, and so is a listed row that does not differ.

The fates derive from the rules that kube-proxy 1.36 programmed, never from kproxy's. `python -m tests.packets.record`
writes both files. The tables have been reviewed: a row that changes needs a reason.

`compare.wrong_fates` compares a rule set with the rows of a scenario.

These results are correct, though they may be surprising:

* A pod on another node is in the cluster according to ClusterCIDR, but not according to NodeCIDR or an interface name.
  In the latter case its packets are masqueraded, and a frontend with `externalTrafficPolicy: Local` treats it like an
  external client.
* `externalTrafficPolicy: Local` does not apply to pods and the node itself: they reach all endpoints at a NodePort or
  VIP, even if packets of external clients are dropped because the node has no endpoint.
* `internalTrafficPolicy: Local` applies only to the ClusterIP, and there to all senders, including external clients. If
  the node has no endpoint, all packets are dropped.
* `masqueradeAll` applies to the ClusterIP. Packets from a pod to a VIP with policy Local are not masqueraded.
* Hairpin traffic is masqueraded only if the random choice is the sender itself, so such a row has two fates.
* Source ranges apply only to the VIP, but there to all senders: pods and the node must be in a range too.
* Affinity keeps an endpoint only within a traffic policy: a client that remembers an endpoint on another node is sent
  to an endpoint on this node at a NodePort with policy Local.
* Without endpoints, ClusterIP, VIP and NodePort reject connections. No iptables rule matches an undefined port of a
  ClusterIP, a VIP with ipMode Proxy, or a NodePort in an IP family that the Service does not have.
* Packets of the node itself to a VIP or external IP without endpoints are not rejected, but leave for the owner of that
  address: OUTPUT does not jump to KUBE-EXTERNAL-SERVICES.
* A Service with the label `service.kubernetes.io/headless` and a ClusterIP rejects connections: only its EndpointSlices
  are ignored.
* NodePorts are reachable at 127.0.0.1, but not at ::1. KUBE-FIREWALL drops packets that another host sends to
  127.0.0.1, except to a NodePort, which treats them like packets to any other address of the node.

In nftables mode:

* The nodes' network 10.99.0.0/24 is part of the ServiceCIDR 10.96.0.0/12 of the recorded clusters. Packets to a node,
  including from the node to itself, are therefore dropped like packets to an unallocated ClusterIP, even after DNAT:
  the Service `kubernetes` is unreachable. kube-proxy's rules do the same in such a cluster.
* If an endpoint on another node reaches itself through this node, its packet is not masqueraded. It receives a packet
  from its own address and drops it, so the client sees a timeout. The table shows only which endpoint was picked.
* No rule matches packets that another host sends to 127.0.0.1. The kernel drops them, because route_localnet is off.
* Unlike in iptables mode, packets of the node itself to a VIP or external IP without endpoints are rejected, and
  packets that belong to no known connection (INVALID) are accepted.
"""
