"""One table of packets for every recorded cluster: who sends what to where, and what becomes of it.

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

The rows were derived from the rules that kube-proxy 1.36 programmed, never from kproxy's: `python -m
tests.packets.record` does it again. A reviewed table is a fact; a row that changes needs a reason.

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
"""
