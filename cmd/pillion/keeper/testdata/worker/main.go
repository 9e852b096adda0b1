// Command worker is what keeper_test.go keeps: it does what its argument says.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"github.com/pillion-project/pillion/cmd/pillion/keeper"
)

func main() {
	k := keeper.Of()
	if k == nil {
		fmt.Println(keeper.Start())
		os.Exit(99)
	}
	open, err := k.Descriptors()
	fmt.Println(k.Deaths(), len(open), err)
	switch what := os.Args[1]; what {
	case "panic":
		panic("as told")
	case "once":
		if k.Deaths() == 0 {
			if _, err := os.Open("/dev/null"); err != nil {
				os.Exit(98)
			}
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
	case "wait":
		told := make(chan os.Signal, 1)
		signal.Notify(told, syscall.SIGTERM)
		k.Ready()
		fmt.Println("waits")
		<-told
		os.Exit(75)
	default:
		code, _ := strconv.Atoi(what)
		os.Exit(code)
	}
}
