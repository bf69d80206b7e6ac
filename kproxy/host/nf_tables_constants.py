"""Constants of linux/netfilter/nf_tables.h, by their kernel names. Pure.

Only the constants that kproxy uses are defined. The constants of other headers follow at the end, grouped by header.
"""

from __future__ import annotations

# enum nft_registers
NFT_REG_VERDICT = 0
NFT_REG32_00 = 8

# enum nft_verdicts
NFT_JUMP = -3
NFT_GOTO = -4
NFT_RETURN = -5

# enum nf_tables_msg_types
NFT_MSG_NEWTABLE = 0
NFT_MSG_GETTABLE = 1
NFT_MSG_DELTABLE = 2
NFT_MSG_NEWCHAIN = 3
NFT_MSG_GETCHAIN = 4
NFT_MSG_DELCHAIN = 5
NFT_MSG_NEWRULE = 6
NFT_MSG_GETRULE = 7
NFT_MSG_DELRULE = 8
NFT_MSG_NEWSET = 9
NFT_MSG_GETSET = 10
NFT_MSG_DELSET = 11
NFT_MSG_NEWSETELEM = 12
NFT_MSG_GETSETELEM = 13
NFT_MSG_DELSETELEM = 14
NFT_MSG_NEWGEN = 15
NFT_MSG_GETGEN = 16
NFT_MSG_NEWOBJ = 18
NFT_MSG_GETOBJ = 19

# enum nft_list_attributes
NFTA_LIST_ELEM = 1

# enum nft_hook_attributes
NFTA_HOOK_HOOKNUM = 1
NFTA_HOOK_PRIORITY = 2

# enum nft_table_flags
NFT_TABLE_F_DORMANT = 1

# enum nft_table_attributes
NFTA_TABLE_NAME = 1
NFTA_TABLE_FLAGS = 2
NFTA_TABLE_HANDLE = 4
NFTA_TABLE_USERDATA = 6

# enum nft_chain_attributes
NFTA_CHAIN_TABLE = 1
NFTA_CHAIN_NAME = 3
NFTA_CHAIN_HOOK = 4
NFTA_CHAIN_POLICY = 5
NFTA_CHAIN_USE = 6
NFTA_CHAIN_TYPE = 7
NFTA_CHAIN_USERDATA = 12

# enum nft_rule_attributes
NFTA_RULE_TABLE = 1
NFTA_RULE_CHAIN = 2
NFTA_RULE_EXPRESSIONS = 4
NFTA_RULE_USERDATA = 7

# enum nft_set_flags
NFT_SET_ANONYMOUS = 0x1
NFT_SET_MAP = 0x8
NFT_SET_TIMEOUT = 0x10
NFT_SET_EVAL = 0x20

# enum nft_set_desc_attributes
NFTA_SET_DESC_SIZE = 1

# enum nft_set_attributes
NFTA_SET_TABLE = 1
NFTA_SET_NAME = 2
NFTA_SET_FLAGS = 3
NFTA_SET_KEY_TYPE = 4
NFTA_SET_KEY_LEN = 5
NFTA_SET_DATA_TYPE = 6
NFTA_SET_DATA_LEN = 7
NFTA_SET_DESC = 9
NFTA_SET_ID = 10
NFTA_SET_TIMEOUT = 11
NFTA_SET_USERDATA = 13
NFTA_SET_EXPR = 17
NFTA_SET_EXPRESSIONS = 18

# enum nft_set_elem_attributes
NFTA_SET_ELEM_KEY = 1
NFTA_SET_ELEM_DATA = 2
NFTA_SET_ELEM_USERDATA = 6
NFTA_SET_ELEM_EXPR = 7

# enum nft_set_elem_list_attributes
NFTA_SET_ELEM_LIST_SET = 2
NFTA_SET_ELEM_LIST_ELEMENTS = 3

# enum nft_data_types
NFT_DATA_VERDICT = 0xFFFFFF00

# enum nft_data_attributes
NFTA_DATA_VALUE = 1
NFTA_DATA_VERDICT = 2

# enum nft_verdict_attributes
NFTA_VERDICT_CODE = 1
NFTA_VERDICT_CHAIN = 2

# enum nft_expr_attributes
NFTA_EXPR_NAME = 1
NFTA_EXPR_DATA = 2

# enum nft_counter_attributes
NFTA_COUNTER_BYTES = 1
NFTA_COUNTER_PACKETS = 2

# enum nft_immediate_attributes
NFTA_IMMEDIATE_DREG = 1
NFTA_IMMEDIATE_DATA = 2

# enum nft_bitwise_attributes
NFTA_BITWISE_SREG = 1
NFTA_BITWISE_DREG = 2
NFTA_BITWISE_LEN = 3
NFTA_BITWISE_MASK = 4
NFTA_BITWISE_XOR = 5
NFTA_BITWISE_OP = 6

# enum nft_cmp_ops
NFT_CMP_EQ = 0
NFT_CMP_NEQ = 1

# enum nft_cmp_attributes
NFTA_CMP_SREG = 1
NFTA_CMP_OP = 2
NFTA_CMP_DATA = 3

# enum nft_lookup_attributes
NFTA_LOOKUP_SET = 1
NFTA_LOOKUP_SREG = 2
NFTA_LOOKUP_DREG = 3
NFTA_LOOKUP_FLAGS = 5

# enum nft_dynset_ops
NFT_DYNSET_OP_UPDATE = 1

# enum nft_dynset_attributes
NFTA_DYNSET_SET_NAME = 1
NFTA_DYNSET_OP = 3
NFTA_DYNSET_SREG_KEY = 4
NFTA_DYNSET_TIMEOUT = 6
NFTA_DYNSET_FLAGS = 9

# enum nft_payload_bases
NFT_PAYLOAD_NETWORK_HEADER = 1
NFT_PAYLOAD_TRANSPORT_HEADER = 2

# enum nft_payload_attributes
NFTA_PAYLOAD_DREG = 1
NFTA_PAYLOAD_BASE = 2
NFTA_PAYLOAD_OFFSET = 3
NFTA_PAYLOAD_LEN = 4

# enum nft_meta_keys
NFT_META_MARK = 3
NFT_META_IIFNAME = 6
NFT_META_L4PROTO = 16

# enum nft_meta_attributes
NFTA_META_DREG = 1
NFTA_META_KEY = 2
NFTA_META_SREG = 3

# enum nft_ct_keys
NFT_CT_STATE = 0
NFT_CT_STATUS = 2

# enum nft_ct_attributes
NFTA_CT_DREG = 1
NFTA_CT_KEY = 2

# enum nft_reject_types
NFT_REJECT_ICMP_UNREACH = 0

# enum nft_reject_attributes
NFTA_REJECT_TYPE = 1
NFTA_REJECT_ICMP_CODE = 2

# enum nft_nat_types
NFT_NAT_DNAT = 1

# enum nft_nat_attributes
NFTA_NAT_TYPE = 1
NFTA_NAT_FAMILY = 2
NFTA_NAT_REG_ADDR_MIN = 3
NFTA_NAT_REG_ADDR_MAX = 4
NFTA_NAT_REG_PROTO_MIN = 5
NFTA_NAT_REG_PROTO_MAX = 6
NFTA_NAT_FLAGS = 7

# enum nft_masq_attributes
NFTA_MASQ_FLAGS = 1

# enum nft_gen_attributes
NFTA_GEN_ID = 1
NFTA_GEN_PROC_PID = 2
NFTA_GEN_PROC_NAME = 3

# enum nft_fib_attributes
NFTA_FIB_DREG = 1
NFTA_FIB_RESULT = 2
NFTA_FIB_FLAGS = 3

# enum nft_socket_attributes
NFTA_SOCKET_KEY = 1
NFTA_SOCKET_DREG = 2

# enum nft_socket_keys
NFT_SOCKET_TRANSPARENT = 0

# enum nft_objref_attributes
NFTA_OBJREF_IMM_TYPE = 1
NFTA_OBJREF_IMM_NAME = 2

# the types of objects
NFT_OBJECT_COUNTER = 1

# enum nft_object_attributes
NFTA_OBJ_TABLE = 1
NFTA_OBJ_NAME = 2
NFTA_OBJ_TYPE = 3
NFTA_OBJ_DATA = 4

# enum nft_fib_result
NFT_FIB_RESULT_ADDRTYPE = 3

# enum nft_fib_flags
NFTA_FIB_F_SADDR = 1
NFTA_FIB_F_DADDR = 2

# enum nft_ng_attributes
NFTA_NG_DREG = 1
NFTA_NG_MODULUS = 2
NFTA_NG_TYPE = 3
NFTA_NG_OFFSET = 4

# enum nft_ng_types
NFT_NG_RANDOM = 1

# linux/netfilter/nfnetlink.h
NFNL_SUBSYS_NFTABLES = 10
NFNLGRP_NFTABLES = 7

# linux/netfilter.h
NF_DROP = 0
NF_ACCEPT = 1
NF_INET_PRE_ROUTING = 0
NF_INET_LOCAL_IN = 1
NF_INET_FORWARD = 2
NF_INET_LOCAL_OUT = 3
NF_INET_POST_ROUTING = 4

# linux/netfilter/nf_nat.h
NF_NAT_RANGE_MAP_IPS = 0x1
NF_NAT_RANGE_PROTO_SPECIFIED = 0x2
NF_NAT_RANGE_PROTO_RANDOM_FULLY = 0x10

# linux/netfilter/nf_conntrack_common.h
IP_CT_NEW = 2
IPS_DST_NAT = 0x20

# linux/rtnetlink.h
RTN_LOCAL = 2

# libnftnl/udata.h: types of user data. The kernel stores user data unchanged, and nft reads it.
NFTNL_UDATA_TABLE_COMMENT = NFTNL_UDATA_CHAIN_COMMENT = NFTNL_UDATA_RULE_COMMENT = NFTNL_UDATA_SET_ELEM_COMMENT = 0
NFTNL_UDATA_SET_KEYBYTEORDER = 0
NFTNL_UDATA_SET_DATABYTEORDER = 1
NFTNL_UDATA_SET_KEY_TYPEOF = 3
NFTNL_UDATA_SET_DATA_TYPEOF = 4
NFTNL_UDATA_SET_DATA_INTERVAL = 6
NFTNL_UDATA_SET_COMMENT = 7
NFTNL_UDATA_SET_TYPEOF_EXPR = 0
NFTNL_UDATA_SET_TYPEOF_DATA = 1
