// Package app is the application of the tests that change what carries connections
// while they go on: a process that knows nothing of Pillion, makes connections, keeps
// some of them and checks every byte; and the servers it talks to.
//
// The process is the test's own binary: [Main], first in TestMain, makes it the
// application where [Start] or a unit with [Env] has started it.
package app
