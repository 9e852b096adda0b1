// Package handler composes the packages of redirect into what an accepted
// connection passes through: who it is and where it was going (origdst), which
// service that is (route), which endpoint it gets (upstream), and the relay
// that carries it (l4).
package handler
