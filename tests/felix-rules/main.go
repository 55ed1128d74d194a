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
		"ipsets":               ipsetInput(),
		"v3.28/SOURCE":         packagesSource(),
		"v3.28/plain/iptables": restoreInput(rendered()),
	}
	byHand := map[string]release{
		// With flow logs only, since there is enough to read; without them v3.28 has the same names.
		"v3.31-by-hand/flow-logs": {flowLogs: true},
		"v3.33-by-hand/flow-logs": {flowLogs: true, kinds: true},
		"v3.33-by-hand/plain":     {kinds: true},
	}
	for name, of := range byHand {
		files[filepath.Join(filepath.Dir(name), "SOURCE")] = handSource
		files[filepath.Join(name, "iptables")] = restoreInput(of.iptables())
		of.nftables = true
		files[filepath.Join(name, "nft")] = of.nftInput()
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
func ipsetInput() string {
	var text strings.Builder
	for _, set := range sets {
		fmt.Fprintf(&text, "create %s hash:net family inet\n", set.name)
		for _, member := range set.members {
			fmt.Fprintf(&text, "add %s %s\n", set.name, member)
		}
	}
	return text.String()
}
