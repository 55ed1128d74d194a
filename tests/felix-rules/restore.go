package main

import (
	"slices"
	"strings"

	"maps"

	"github.com/projectcalico/calico/felix/environment"
	"github.com/projectcalico/calico/felix/iptables"
	"github.com/projectcalico/calico/felix/rules"
)

// What iptables 1.8 can do.
var features = &environment.Features{SNATFullyRandom: true, MASQFullyRandom: true, RestoreSupportsLock: true}

// A table of iptables: Felix' own chains, and what it puts into the kernel's, before all others' rules and after them.
type table struct {
	name   string
	chains []*iptables.Chain
	insert map[string][]iptables.Rule
	then   map[string][]iptables.Rule
}

// restoreInput is the input of `iptables-restore`, with each rule's hash in a comment as Felix has it
// (`felix/iptables/table.go`).
func restoreInput(tables []table) string {
	var buffer iptables.RestoreInputBuilder
	for _, table := range tables {
		buffer.StartTransaction(table.name)
		chains := slices.SortedFunc(slices.Values(table.chains), func(one, other *iptables.Chain) int {
			return strings.Compare(one.Name, other.Name)
		})
		for _, chain := range chains {
			buffer.WriteForwardReference(chain.Name)
		}
		for _, rules := range []map[string][]iptables.Rule{table.insert, table.then} {
			for _, name := range slices.Sorted(maps.Keys(rules)) {
				write(&buffer, name, rules[name], iptables.CalculateRuleHashes(name, rules[name], features))
			}
		}
		for _, chain := range chains {
			write(&buffer, chain.Name, chain.Rules, chain.RuleHashes(features))
		}
		buffer.EndTransaction()
	}
	return string(buffer.GetBytesAndReset())
}

func write(buffer *iptables.RestoreInputBuilder, chain string, of []iptables.Rule, hashes []string) {
	for index, rule := range of {
		comment := `-m comment --comment "` + rules.RuleHashPrefix + hashes[index] + `"`
		buffer.WriteLine(rule.RenderAppend(chain, comment, features))
	}
}
