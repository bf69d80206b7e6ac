"""One table of packets for every recorded cluster: who sends what to where, and what becomes of it, in either mode.

`packets.txt` has one row per packet, its columns two or more blanks apart:

    scenario      a folder of tests/golden
    from          who sends it (see places.py); `endpoint A` is the pod with that address;
                  `node as A` is this node where it holds A as an address of its own;
                  `... remembering S` has been sent to the endpoint S by session affinity before
    to            address:port and protocol
    fate          `untouched`: arrives where it was sent to, from whom it was sent
                  `dnat E, E`: is sent to one of these endpoints, each as likely as the others
                  `dnat+masq E`: the same, and the endpoint sees the node as the source
                  `...+affinity`: and the next one goes to the same endpoint
                  `reject port-unreachable`, `drop`
                  Several of them, where the fate depends on which endpoint chance picks, are parted by `; `.

The fates are those in iptables mode. `nftables.txt` holds the rows whose fate is another one in nftables mode, with
that fate, each under the reason for it: a heading `## REASON`, one of the list in differences.py. Any other row has the
same fate in both modes. A row that differs and is not there is an error, and so is one that is there and does not.

The rows were derived from the rules that kube-proxy 1.36 programmed, never from kproxy's: `python -m
tests.packets.record` does it again, for both files. A reviewed table is a fact; a row that changes needs a reason.

`compare.wrong_fates` compares the rules of any dump with the rows of a scenario.

What may surprise, and is right:

* A pod of another node is "in the cluster" under ClusterCIDR, but not under NodeCIDR or by interface: then it is
  masqueraded, and a frontend with `externalTrafficPolicy: Local` treats it as a host outside.
* `externalTrafficPolicy: Local` does not bind pods and this node: they get all endpoints at a NodePort or VIP, even
  where a host outside is dropped because there is no endpoint here.
* `internalTrafficPolicy: Local` binds only the ClusterIP. There it holds for everyone, hosts outside included, and
  with no endpoint here everyone is dropped.
* `masqueradeAll` masquerades what goes to the ClusterIP. A pod that goes to a VIP of policy Local is not.
* A hairpin is masqueraded only if chance picks the sender itself: one row has then two fates.
* Source ranges guard the VIP only, but from everyone: pods and this node must be in a range, too.
* Affinity binds to an endpoint only under the policy that picks it: a client that was sent to another node by a pod's
  way comes to this node's endpoint by a NodePort of policy Local.
* Without endpoints, ClusterIP, VIP and NodePort refuse. An undefined port of a ClusterIP is left alone (iptables has
  no rule for it), and so are a VIP of ipMode Proxy and a NodePort in a family that the Service is not of.
* This node itself is the exception: its packets to a VIP or external IP without endpoints leave, unrefused, for whoever
  is behind that address (KUBE-EXTERNAL-SERVICES is not reached from OUTPUT).
* A Service with the label `service.kubernetes.io/headless` and a ClusterIP refuses: only its slices are passed over.
* 127.0.0.1 is an address for NodePorts, ::1 is not. What a neighbour sends to 127.0.0.1 is dropped by KUBE-FIREWALL,
  but not at a NodePort, which treats it like what comes for any other address of this node.

And in nftables mode:

* The recorded nodes, 10.99.0.0/24, lie in the ServiceCIDR 10.96.0.0/12. So what goes on to a node, or from this one to
  itself, is dropped like what goes to an unallocated ClusterIP, even after its destination was translated: the
  Service `kubernetes` cannot be reached. That is what kube-proxy's rules do in such a cluster, and so the kernel.
* An endpoint elsewhere that reaches itself by way of this node is not masqueraded: it gets a packet from its own
  address, which it drops. Chance has still picked it, as the table says; the client sees a timeout.
* What a neighbour sends to 127.0.0.1 is untouched by rules. The kernel drops it, since route_localnet is off.
* Unlike in iptables mode, the node itself is refused by a VIP or external IP without endpoints, and packets of no
  known connection (INVALID) are let through.
"""
