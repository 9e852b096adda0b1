// Package node runs a package's tests on a node of their own: namespaces with
// containerd and the kubelet in them, and a network that leads nowhere else. Of
// all that, nothing is left when the tests end, however they end.
package node
