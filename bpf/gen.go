package bpf

// -mcpu=v2, not v3: with 32-bit registers clang spills halves of stack slots, which
// the verifier of 6.1 refuses without CAP_PERFMON. include/net.h has the rule for
// what the sources themselves put on the stack; TestCapabilities on 6.1 checks both.
//
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -cflags "-O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -mcpu=v2 -nostdinc -Iheaders" -type instance -type settings -type state -type beat -type live_key -type live -type decision -type sent -type slot -type usage -type service -type endpoint_key -type rule_key -type prefix_key -type route -type ip_addr -type conn_event -type held -type set_tiers -type set_config -type set_state -type set_endpoint -type set_table -type set_row -type endpoint -type endpoint_name -type dry_run -type move -type set_query -type policy -type hash_on -type held_kind -type hold -type connect_mode -type slot_state -type route_kind -type event_kind -type instance_kind -type on_failure -type conn_path -type reason -type tally -type ending abi abi.bpf.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -cflags "-O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -mcpu=v2 -nostdinc -Iheaders" connect connect.bpf.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -cflags "-O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -mcpu=v2 -nostdinc -Iheaders" names names.bpf.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -cflags "-O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -mcpu=v2 -nostdinc -Iheaders" explain explain.bpf.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -cflags "-O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -mcpu=v2 -nostdinc -Iheaders" lookup lookup.bpf.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -cflags "-O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -mcpu=v2 -nostdinc -Iheaders" sockops sockops.bpf.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -cflags "-O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -mcpu=v2 -nostdinc -Iheaders" mirror mirror.bpf.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -cflags "-O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -mcpu=v2 -nostdinc -Iheaders" move move.bpf.c
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -cflags "-O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -mcpu=v2 -nostdinc -Iheaders" former former.bpf.c
