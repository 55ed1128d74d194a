package main

import (
	"runtime/debug"
	"strings"
)

const calico = "github.com/projectcalico/calico"

// packagesSource says which release the packages are of that rendered the rules.
func packagesSource() string {
	version := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, module := range info.Deps {
			if module.Path == calico {
				version = module.Version
			}
		}
	}
	commit := version[strings.LastIndex(version, "-")+1:]
	return "Rendered by Calico's own packages: module " + calico + " " + version + "\n" +
		"(commit " + commit + ", branch release-v3.28 after v3.28.5): felix/rules and felix/iptables.\n"
}

// handSource names what the hand-written chains follow.
const handSource = `Written by hand after Calico's source, with felix/iptables of v3.28 for the form and the digests of iptables' rules.
Read, of projectcalico/calico:
  felix/rules/policy.go                     0162f27378c0
  felix/rules/endpoints.go                  between v3.32 and v3.34
  felix/rules/static.go                     00b9aad19b30
  felix/rules/deny_action_test.go           5deb23c184b8
  felix/rules/dispatch.go                   1f065ee81c7b
  felix/rules/nflogprefix.go                08bb13aec5af
  felix/types/policy_id.go                  between v3.32 and v3.34
  felix/dataplane/driver.go                 between v3.30 and v3.34
  felix/iptables/actions.go                 between v3.30 and v3.34
  felix/nftables/renderer.go                08bb13aec5af
  felix/nftables/table_layer.go             00eb9015ac68
  felix/nftables/nftrender/match_builder.go 1d76c9e556e4
  felix/nftables/nftrender/actions.go       3f4712bcf0fd
`
