// Package cluster runs Pillion in a whole cluster of one node: etcd, API server,
// controllers, scheduler, kube-proxy, kubelet and containerd.
package cluster
