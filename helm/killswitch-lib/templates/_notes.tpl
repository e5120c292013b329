{{/* For NOTES.txt: what to type, what is not protected, and what is missing. Argument: the root. */}}
{{- define "killswitch.notes" -}}
{{- $v := .Values.killswitch -}}
{{- $ns := .Release.Namespace -}}
{{- if not $v.enabled -}}
WARNING  killswitch.enabled is false: no pod of this release has a kill switch.
{{- else -}}
KILL      kubectl exec -it -n {{ $ns }} POD -c killswitch -- killswitch trigger --reason "TEXT" --by YOU
          all pods at once:  kubectl killswitch -n {{ $ns }} trigger --reason "TEXT" --by YOU
CHECK     kubectl exec -n {{ $ns }} POD -c killswitch -- killswitch status
          kubectl killswitch -n {{ $ns }} status
RECOVER   kubectl exec -it -n {{ $ns }} POD -c killswitch -- killswitch recover --reason "TEXT" --by APPROVER
AUDIT     kubectl exec -n {{ $ns }} POD -c killswitch -- killswitch audit --since 24h
PODS      kubectl get pods -n {{ $ns }} -l killswitch.io/guarded=true

The first line and the exit code tell the truth: 0 done or allowed, 1 error, 2 usage, 3 blocked, 4 refused.

NOT PROTECTED
 - Orders of a bot that does not ask the gate, and orders that leave by another way than this pod.
 - Working orders: a kill cancels none. The bot does; the gate always lets cancels pass.
 - Against whoever may exec into the pod or change this release: they can stop the sidecar, or leave it out.
{{- if eq $v.state.volume "emptyDir" }}
 - State over the loss of the pod: it is on an emptyDir. {{ if include "killswitch.asksPrometheus" . }}A new pod takes it from Prometheus' record, which misses a kill
   between the last scrape and the loss.{{ else }}No Prometheus is asked, so a new pod starts ACTIVE. Set
   killswitch.config.prometheus.urls or killswitch.state.volume.{{ end }}
{{- end }}
{{- range fromYamlArray (include "killswitch.warnings" .) }}

WARNING  {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "killswitch.asksPrometheus" -}}
{{- $config := .Values.killswitch.config -}}
{{- $prometheus := dig "prometheus" dict $config -}}
{{- if hasKey $prometheus "urls" -}}{{- if $prometheus.urls -}}true{{- end -}}{{- else if not $config.scrape -}}true{{- end -}}
{{- end }}

{{/* What makes this release weaker than it looks, as a YAML list. */}}
{{- define "killswitch.warnings" -}}
{{- $v := .Values.killswitch -}}
{{- $config := $v.config -}}
{{- $mode := dig "switch" "mode" "active" $config -}}
{{- if eq $mode "shadow" }}
- "SHADOW MODE: rules are evaluated and shown, and do NOT block orders. Only an operator's own kill blocks."
{{- else if eq $mode "disabled" }}
- "The switch is DISABLED: every order is allowed, and a kill is refused."
{{- end }}
{{- if $v.existingConfigMap }}
- "The configuration is in ConfigMap {{ $v.existingConfigMap }}, which this chart does not look into."
{{- else }}
{{- if not (or $v.approvers.secretName $v.approvalCode.secretName (dig "recovery" "approvers_file" "" $config)) }}
{{- if dig "recovery" "require_approval" true $config }}
- "NO APPROVERS: nobody can release a kill. Make hashes with `killswitch hash-code`, put them into a Secret and set killswitch.approvers.secretName."
{{- end }}
{{- end }}
{{- if not (dig "recovery" "require_approval" true $config) }}
- "Recovery needs no approval: whoever may exec can release a kill."
{{- end }}
{{- if $v.approvalCode.secretName }}
- "The approval code is in the container's environment, where whoever may exec can read it. Use killswitch.approvers."
{{- end }}
{{- if not (dig "prometheus" "urls" list $config) }}
{{- if include "killswitch.asksPrometheus" . }}
- "NO PROMETHEUS URL: rules ask http://prometheus:9090. If that is not yours, the gate stays shut: set killswitch.config.prometheus.urls."
{{- else }}
- "NO PROMETHEUS URL: rules see only what is scraped directly, and a lost state cannot be restored. Set killswitch.config.prometheus.urls."
{{- end }}
{{- end }}
{{- if not (dig "alertmanager" "notify" "urls" list $config) }}
- "No Alertmanager: nobody is told of a kill. Set killswitch.config.alertmanager.notify.urls."
{{- end }}
{{- end }}
{{- if and $v.defaultRules (not $v.existingRulesConfigMap) }}
- "The default rules are in force. The bot must export portfolio_drawdown_ratio, daily_pnl_ratio, trading_heartbeat_timestamp_seconds and exchange_connected, or the gate stays shut (not_ready)."
{{- end }}
{{- end }}
