package bpf

// Stands in a test file, so that bpf2go writes core_bpfel_test.go, and the object
// is in no binary but the test's.
//
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -no-global-types -cflags "-O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -mcpu=v2 -nostdinc -Iheaders" -type ip_addr -type attempt -type facts -type health -type arrival -type refusal -type run_leave_alone -type run_is_plain -type run_by_rules -type run_obstacle -type run_path_of -type run_admit -type run_awaits -type end -type run_ending_of -type peer_end -type run_peer_ended -type run_words -type run_health -type run_is_less -type run_holds -type run_address -type run_slot_addr core tests/core.test.c
