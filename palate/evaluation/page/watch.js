(function(){
var known='';
function ask(){fetch('/state').then(function(r){return r.text()}).then(function(now){
if(known&&now!==known)location.reload();
known=now;
}).catch(function(){}).then(function(){setTimeout(ask,4000)})}
ask();
})();
