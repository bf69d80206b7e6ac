"""The checks of `make kernels`: names, and the tests of tests/kernel that each of them runs."""

from __future__ import annotations

from dataclasses import dataclass

KERNEL_TESTS = "tests/kernel"


@dataclass(frozen=True)
class Check:
    """A line of the report. `tests` are names without `tests/kernel/test_`, such as `host.py::test_x[a]`; without
    brackets, all variations of a test are run.

    A skipped test is a failure, except for one with a reason that contains `may_lack`.
    """

    name: str
    tests: tuple[str, ...]
    may_lack: str = ""

    @property
    def node_ids(self) -> list[str]:
        """The tests as pytest names them."""
        return [f"{KERNEL_TESTS}/test_{test}" for test in self.tests]

    def includes(self, node_id: str) -> bool:
        """Return whether a test belongs to this check."""
        return any(node_id == own or node_id.startswith(f"{own}[") for own in self.node_ids)


VERSIONS = ("ipv4", "ipv6")
MODES = ("iptables", "nftables")
FRONTENDS = "nftables_traffic.py::test_all_frontends_are_reachable_from_pods_clients_and_the_node"


def _protocol(protocol: str) -> tuple[str, ...]:
    """Return the tests of a protocol: an endpoint, none, and in nftables mode all frontends."""
    ids = [f"[{mode}-{version}-{protocol}]" for mode in MODES for version in VERSIONS]
    return (
        *(f"traffic.py::test_all_protocols_reach_their_endpoint{each}" for each in ids),
        *(f"traffic.py::test_service_without_endpoints_rejects{each}" for each in ids),
        *(f"{FRONTENDS}[{version}-{protocol}]" for version in VERSIONS),
    )


CHECKS = (
    Check(
        "nftables mode",
        (
            "nftables_probe.py::test_kernel_accepts_the_probe_and_nothing_remains",
            "nftables_probe.py::test_nft_accepts_the_probe",
            "nftables_commit.py::test_all_statements_and_elements_are_identical_over_netlink_and_nft",
            "nftables_commit.py::test_deletions_are_identical_over_netlink_and_nft",
            "nftables_commit.py::test_recorded_clusters_are_identical_over_netlink_nft_and_text[random-11-Family.IPV4]",
            "nftables_commit.py::test_recorded_clusters_are_identical_over_netlink_nft_and_text[dual-stack-Family.IPV6]",
            "nftables_restart.py::test_restart_writes_only_chains[session-affinity-Family.IPV4]",
            "nftables_restart.py::test_restart_writes_only_chains[dual-stack-Family.IPV6]",
            "nftables_restart.py::test_dormant_table_is_awakened_and_keeps_affinity_clients",
            "nftables_restart.py::test_table_is_read_as_it_was_written",
            "nftables_repair.py::test_counters_are_never_taken_for_changes",
            "rules_watch.py::test_foreign_change_is_reported_with_the_name_of_the_process",
        ),
    ),
    Check(
        "iptables-nft",
        (
            "recordings.py::test_both_variants_of_iptables_program_the_rules_of_kube_proxy[nft-random-11]",
            "recordings.py::test_both_variants_of_iptables_program_the_rules_of_kube_proxy[nft-session-affinity]",
            "family_discovery.py::test_probing_nf_tables_changes_nothing",
            "iptables_repair.py::test_own_transactions_are_not_foreign",
            "iptables_repair.py::test_fingerprint_identifies_the_rules_of_a_chain",
            "iptables_table_damage.py::test_older_rule_set_is_repaired_without_iptables_save",
            "iptables_table_damage.py::test_deleted_tables_are_restored_without_iptables_save",
        ),
    ),
    Check(
        "iptables-legacy",
        (
            "recordings.py::test_both_variants_of_iptables_program_the_rules_of_kube_proxy[legacy-random-11]",
            "recordings.py::test_both_variants_of_iptables_program_the_rules_of_kube_proxy[legacy-session-affinity]",
            "x_tables.py::test_content_does_not_depend_on_packets",
            "x_tables.py::test_each_replacement_of_the_same_size_changes_the_content",
        ),
        may_lack="legacy iptables does not work on this machine",
    ),
    Check(
        "TCP",
        (
            *_protocol("TCP"),
            "traffic.py::test_hairpin_traffic_is_masqueraded[iptables-ipv4]",
            "traffic.py::test_hairpin_traffic_is_masqueraded[nftables-ipv6]",
            "traffic.py::test_open_connection_outlives_the_rules_of_its_endpoint[iptables-ipv6]",
            "traffic.py::test_open_connection_outlives_the_rules_of_its_endpoint[nftables-ipv4]",
        ),
    ),
    Check(
        "UDP",
        (
            *_protocol("UDP"),
            "udp_flows.py::test_flow_moves_to_the_replacement_of_its_endpoint[client-ipv6-iptables]",
            "udp_flows.py::test_flow_moves_to_the_replacement_of_its_endpoint[outsider-ipv4-nftables]",
        ),
    ),
    Check(
        "SCTP",
        (
            "sctp.py::test_endpoints_share_the_associations_of_every_frontend",
            "sctp.py::test_associations_from_outside_and_to_the_own_pod_are_masqueraded",
            "sctp.py::test_policy_local_keeps_the_source[ipv4-iptables]",
            "sctp.py::test_policy_local_keeps_the_source[ipv6-nftables]",
            "sctp.py::test_every_frontend_rejects_without_endpoints",
            "sctp.py::test_new_associations_follow_a_change_of_endpoints_and_open_ones_stay",
            "sctp.py::test_session_affinity_keeps_a_client_on_its_endpoint[ipv4-nftables]",
            "sctp.py::test_session_affinity_keeps_a_client_on_its_endpoint[ipv6-iptables]",
        ),
    ),
    Check(
        "conntrack",
        (
            "conntrack.py::test_only_the_stale_entry_is_deleted",
            "conntrack.py::test_kernel_filters_dumps",
            "conntrack.py::test_timeouts_are_set_in_this_namespace",
        ),
    ),
    Check(
        "nfacct",
        (
            "host.py::test_rule_can_use_a_counter_once_it_exists",
            "host.py::test_existing_counters_are_kept",
            "host.py::test_rejected_request_raises_with_the_reason",
            "status_server.py::test_kernel_counters_are_exported",
        ),
    ),
    Check(
        "IPVS cleanup",
        (
            "ipvs_leftovers.py::test_virtual_servers_with_destinations_are_removed",
            "ipvs_leftovers.py::test_foreign_virtual_servers_are_kept",
            "ipvs_leftovers.py::test_set_entries_are_read",
        ),
    ),
)

SELECTED = [node_id for check in CHECKS for node_id in check.node_ids]
"""The tests of all checks as pytest names them."""
