// Felix' rule sets for a fixed set of policies, profiles and endpoints: input of `ipset restore`, `iptables-restore` and
// `nft -f`, a folder a release and a variant.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/sirupsen/logrus"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: felix-rules FOLDER")
		os.Exit(2)
	}
	logrus.SetLevel(logrus.ErrorLevel)
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(folder string) error {
	files := map[string]string{
		"ipsets":               ipsetInput(false),
		"ipsets6":              ipsetInput(true),
		"v3.28/SOURCE":         packagesSource(),
		"v3.28/plain/iptables": restoreInput(rendered(settings{})),
		// Without the tables raw and mangle: the kernel takes neither with the rules that reject.
		"v3.28/reject/iptables": restoreInput(rendered(settings{rejects: true})[2:]),
		"v3.28/ipv6/ip6tables":  restoreInput(rendered(settings{ipv6: true})),
	}
	byHand := map[string]release{
		// With flow logs only, since there is enough to read; without them v3.28 has the same names.
		"v3.31-by-hand/flow-logs": {flowLogs: true},
		"v3.33-by-hand/flow-logs": {flowLogs: true, kinds: true},
		"v3.33-by-hand/plain":     {kinds: true},
		"v3.33-by-hand/reject":    {settings: settings{rejects: true}, kinds: true},
		"v3.33-by-hand/ipv6":      {settings: settings{ipv6: true}, kinds: true, flowLogs: true},
	}
	for name, of := range byHand {
		files[filepath.Join(filepath.Dir(name), "SOURCE")] = handSource
		iptables, nft := "iptables", "nft"
		if of.ipv6 {
			iptables, nft = "ip6tables", "nft6"
		}
		files[filepath.Join(name, iptables)] = restoreInput(of.iptables())
		of.nftables = true
		files[filepath.Join(name, nft)] = of.nftInput()
	}
	for name, text := range files {
		file := filepath.Join(folder, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// ipsetInput is the input of `ipset restore`.
func ipsetInput(ipv6 bool) string {
	family := "inet"
	if ipv6 {
		family = "inet6"
	}
	var text strings.Builder
	for _, set := range setsOf(ipv6) {
		fmt.Fprintf(&text, "create %s hash:net family %s\n", set.name, family)
		for _, member := range set.members {
			fmt.Fprintf(&text, "add %s %s\n", set.name, member)
		}
	}
	return text.String()
}
