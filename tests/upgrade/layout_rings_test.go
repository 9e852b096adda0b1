package upgrade

// otherRings are changes, by file, to what is in rings and in endpoint sets, and to their
// sizes: fields that are moved about, wider, or new.
var otherRings = map[string]map[string]string{
	"include/abi.h": {
		`struct conn_event \{\n`: "struct conn_event {\n\t__u64 spare;\n\t__u64 srtt_us;\n\t__u32 retransmits;\n\t__u32 more;\n",
		`(?s)\t__u32 srtt_us;\n\t__u32 retransmits;\n(\t__u16 source_port;\n.*?\t__u16 endpoint_port;\n)\t__u8 zero\[6\];\n`: "${1}\t__u8 zero[2];\n",

		`struct held \{\n`: "struct held {\n\t__u64 spare;\n",
		`\t__u8 kind; (/\* enum held_kind \*/)\n\t__u8 size; /\* of the frame \*/\n\t__u8 zero\[6\];\n`: "\t__u16 size;\n\t__u8 kind; ${1}\n\t__u8 zero[5];\n",

		`struct set_row \{\n\t__u64 d\[4\];`: "struct set_row {\n\t__u64 d[5];",
		`\t__u32 entry\[`:                    "\t__u64 spare;\n\t__u32 entry[",
		`entry(\[PL_SET_TABLE_ROW\];\n)`:     "entry${1}\t__u64 more[2];\n",
		`struct set_tiers \{\n`:              "struct set_tiers {\n\t__u64 spare;\n",
		`struct set_config \{\n`:             "struct set_config {\n\t__u32 spare;\n\t__u32 more;\n",
		`\t__u32 first; /\* of its endpoints, from 0 \*/\n\t__u32 count;\n`: "\t__u32 count;\n\t__u32 first;\n",
		`\t__u64 verdict_until;`:                     "\t__u64 spare;\n\t__u64 verdict_until;",
		`struct set_endpoint \{\n`:                   "struct set_endpoint {\n\t__u32 alias;\n\t__u32 spare;\n",
		`\t__u32 alias; /\* index in the tier \*/\n`: "\t__u32 more;\n",
		`#define PL_SET_TABLE_ROW 8`:                 "#define PL_SET_TABLE_ROW 4",
		`#define PL_SETS 16384`:                      "#define PL_SETS 20000",
	},
	"include/maps.h": {
		`(BPF_MAP_TYPE_RINGBUF\);\n\t\t\t__uint\(max_entries, )1 << 17`: "${1}1 << 16",
		`(BPF_MAP_TYPE_RINGBUF\);\n\t__uint\(max_entries, )1 << 20`:     "${1}1 << 21",
	},
	"former.bpf.c": {`1 << 20`: "1 << 21"},
	"types.go": {
		`(SetTableRow +)= 8`: "${1}= 4",
		`(Sets +)= 16384`:    "${1}= 20000",
	},
}
